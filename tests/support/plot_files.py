"""Logs and reports as `eval` and `calibrate` write them."""

import json

import numpy as np


def write_log(path, records, **settings):
    settings = {"task": "passkey", "model": "/ckpt/tiny", "dca": [48, 16]} | settings
    lines = [{"settings": settings}, *records]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def record(length, depth, correct, sample=0, **more):
    return {"length": length, "depth": depth, "sample": sample, "correct": correct} | more


def write_report(path, layers=3, heads=2, **changes):
    rng = np.random.default_rng(1)

    def table():
        return rng.uniform(0.31, 0.99, (layers, heads)).round(4).tolist()

    report = {
        "format": "qwen-jax calibration 1",
        "model": "/ckpt/tiny",
        "lengths": [8192, 16384],
        "recall": {"8192": table(), "16384": table()},
        "density": {"8192": table(), "16384": table()},
        "speedup": {"8192": 1.25, "16384": 1.7},
    } | changes
    path.write_text(json.dumps(report))
    return report
