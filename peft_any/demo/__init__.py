"""The demonstration: a published network fine-tuned by several methods, offline."""
