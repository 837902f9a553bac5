"""Where booted guests come from: a warm VM, a template, or a cold boot."""
