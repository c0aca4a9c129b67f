"""The demo: the whole road on real data from the package registry, on a laptop's CPU (see `pipeline.demo.run`)."""
