"""What is timed, against named peers in the same run."""

from normlab.bench.layers import LayersBenchmark, bench_layers

__all__ = ["LayersBenchmark", "bench_layers"]
