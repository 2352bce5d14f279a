"""Living with other libraries: adapters, FSDP, foreign hooks, and what is refused with a reason. Not the method."""
