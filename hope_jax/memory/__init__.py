"""Fast weights as pure functions: architectures, rules, chunk scan, CMS."""
