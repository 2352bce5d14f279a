"""From files and the hub to rows of tokens: formats, chat templates, mixing, packing, checks, the preview."""
