"""The tape: gradients for array libraries that have none of their own."""
