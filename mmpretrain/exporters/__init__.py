"""Our weights under other libraries' names, and back."""
