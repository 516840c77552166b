"""The command line: one module per command, each with one public function."""
