"""The commands of `covr-fast`, one per file: `main(arguments)` returns the exit code. Each imports what it
needs when it runs, so that `covr-fast --help` is quick."""
