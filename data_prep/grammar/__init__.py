"""The demo's grammar: English sentences and their German translations, drawn at random but reproducibly."""
