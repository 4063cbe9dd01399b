"""Frozen encoder/decoder pairs behind one protocol."""
