"""The kernel of the compressors' recurrence in a decode step."""
