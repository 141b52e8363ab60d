"""What the page with a slider shows: answers of every exit, and their HTML. Needs neither torch nor gradio."""
