"""From a pipeline file to a product that can be served: fetch, quantize, build, each once, checked and resumable."""
