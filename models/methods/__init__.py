"""One pretraining method per file; a method is found by its module name."""
