"""Living with other libraries: adapters, FSDP, bypassed hooks, and what is refused with a reason. Not the method."""
