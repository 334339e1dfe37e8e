"""Select: columns and diagonals that the last queries of a slice attend to, per head."""

from pallas_kernels.select.api import Selection as Selection
from pallas_kernels.select.api import Votes as Votes
from pallas_kernels.select.api import select as select
from pallas_kernels.select.api import select_keys as select_keys
from pallas_kernels.select.api import vote as vote
