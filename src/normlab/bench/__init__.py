"""What is timed, against named peers in the same run."""

from normlab.bench.fleet import FleetBenchmark, bench_fleet
from normlab.bench.layers import LayersBenchmark, bench_layers
from normlab.bench.own import own_fleets

__all__ = ["FleetBenchmark", "LayersBenchmark", "bench_fleet", "bench_layers", "own_fleets"]
