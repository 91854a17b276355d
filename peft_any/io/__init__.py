"""Files: safetensors, checkpoints, and Hugging Face PEFT's adapter directories."""
