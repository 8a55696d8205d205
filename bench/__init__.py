"""Entry points that measure: speed, fidelity, regression. Each prints what it found and writes it under results/."""
