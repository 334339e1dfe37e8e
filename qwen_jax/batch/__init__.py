"""Files of requests, answered side by side, by runs that may be killed and started again."""
