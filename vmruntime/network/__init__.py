"""CNI, network namespaces and taps."""
