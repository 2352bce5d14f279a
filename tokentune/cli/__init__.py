"""How commands are called: flags, the settings file, messages, exit codes. Nothing that a library would use."""
