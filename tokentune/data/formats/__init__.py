"""From files and the hub to rows, and from rows to prompts with answers or messages. Nothing about tokens."""
