"""From what a source holds to what every output byte will be: pure functions, no I/O."""
