"""For developers: benchmarks and mutation testing."""
