"""No program that is given the cache copies it, or a layer of it: read off what was compiled."""

import hlo
import jax
import pytest
from support import compilation, engine_programs
from support.children import run

from qwen_jax.distributed import sharding
from qwen_jax.engine.model_runner import Programs

pytestmark = [pytest.mark.optimized, pytest.mark.usefixtures("unchecked")]

WITHOUT_CACHE = {"sample", "sample_logprobs", "logits", "set_seen_tokens"}
ON_ONE_DEVICE = {"sparse_plan", "survey"}


def test_a_cache_of_one_page_and_one_row_is_written_in_place():
    names = "prefill", "score", "decode", "decode_logprobs", "extract_kv", "insert_kv", "copy_page"
    engine = engine_programs.engine(pages=1, rows=1)
    assert engine_programs.check(engine, *names) == {*names}


@pytest.mark.parametrize(("pages", "rows"), [(1, 2), (2, 1)])
def test_decode_writes_a_cache_in_place(pages, rows):
    engine_programs.check(engine_programs.engine(pages, rows), "decode")


@pytest.mark.long
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("pages", [1, 2, 7])
def test_every_program_writes_a_cache_in_place(pages, rows):
    everything = {*Programs._fields} - WITHOUT_CACHE
    assert engine_programs.check(engine_programs.engine(pages, rows)) == everything


@pytest.mark.long
@pytest.mark.parametrize("mesh", ["seq=2,tensor=2", "seq=2", "tensor=2"])
@pytest.mark.parametrize(("pages", "rows"), [(1, 1), (2, 1), (1, 3), (7, 3)])
def test_every_program_writes_a_cache_in_place_on_a_mesh(mesh, pages, rows):
    run(check_on_mesh, mesh, pages, rows)


def check_on_mesh(text, pages, rows):
    compilation.optimize(True)
    jax.config.update("jax_num_cpu_devices", 4)
    everything = {*Programs._fields} - WITHOUT_CACHE - ON_ONE_DEVICE
    engine = engine_programs.engine(pages, rows, sharding.parse(text))
    assert engine_programs.check(engine) == everything


def test_copies_are_found_in_the_text_of_a_program():
    text = """
%write (a: f32[4,2,3], b: f32[1,2,3]) -> f32[4,2,3] {
  ROOT %u = f32[4,2,3]{2,1,0} dynamic-update-slice(%a, %b, %i, %j, %k), metadata={}
}
%make (a: f32[4,2,3]) -> f32[2,3] {
  ROOT %s.1 = f32[1,6]{1,0} multiply(%a, %b)
}
ENTRY %main () -> f32[4,2,3] {
  %p = f32[4,2,3]{2,1,0} parameter(0)
  %in_place = f32[4,2,3]{2,1,0} fusion(%p, %q), kind=kLoop, calls=%write
  %layer = f32[1,2,3]{2,1,0} fusion(%p), kind=kLoop, calls=%make
  %begun = (f32[4,2,3]{2,1,0}, f32[4,2,3]{2,1,0}, u32[]) copy-start(%in_place)
  %other = f32[5,2,3]{2,1,0} copy(%q)
  ROOT %c = f32[24]{0:T(8,128)} copy(%in_place)
}
"""
    assert hlo.copies(text, (4, 2, 3)) == [
        "copy 24",
        "copy-start 4,2,3",
        "fusion 1,2,3",
        "multiply 1,6",
    ]
