"""A sweep: its trials, their record, what comes of them side by side."""
