"""Conversations to tokens by a chat template, and which of them are learnt."""
