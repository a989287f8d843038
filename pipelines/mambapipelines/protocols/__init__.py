"""Published species tasks."""
