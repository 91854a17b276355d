"""Adapters on the objects of other frameworks; nothing here is imported unasked."""
