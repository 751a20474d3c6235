"""One small module a verb; each has `main(argv) -> exit code`."""
