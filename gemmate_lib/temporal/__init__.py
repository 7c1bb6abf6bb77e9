"""Time for a language model: what becomes of a timestamp, and a Gemma-2 that takes one."""
