"""What people say of images: a page in the browser, and the table of what they decided."""
