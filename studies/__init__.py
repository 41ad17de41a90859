"""One file a study: what is asked, and how the answer is judged. docs/studies.md."""
