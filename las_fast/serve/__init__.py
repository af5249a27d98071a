"""An HTTP service that transcribes recordings, and a web page for it; python -m las_fast.serve starts it."""
