"""Definitions of tasks in the harness's own form, and how they read local text."""
