"""Pages to look at: trajectories, a trie, and a run; each one HTML file that loads nothing.

pages/page.html      what all have in common; page.css and page.js too
pages/NAME.*         the body, the style and the script of each page
"""
