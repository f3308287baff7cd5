"""Programs around the package: benchmarks, studies, the tiny model. Run as modules; never imported by the package."""
