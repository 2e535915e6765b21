"""Result files, read and computed with; nothing is drawn or printed here."""
