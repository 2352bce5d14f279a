"""How commands are called: the settings file. Nothing that a library would use."""
