"""Stages of `lorry moe`: what is up to date, and what is made behind the router."""
