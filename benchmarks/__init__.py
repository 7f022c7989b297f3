"""What the package is measured with: run each script from the repository's root, `python -m benchmarks.speed.solve`."""
