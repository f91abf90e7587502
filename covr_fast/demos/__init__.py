"""Scripted drivers: reference rows beside what an agent learns."""
