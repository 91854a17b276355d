"""One file per method, named after its `peft_type`."""
