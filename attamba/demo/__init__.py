"""`attamba demo`: Attamba beside a transformer of its size, on text that every machine has."""
