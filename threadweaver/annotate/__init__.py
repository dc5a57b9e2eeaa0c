"""The trajectory generator: parallel trajectories out of a model's own sequential ones
(docs/semantics.md, "Trajectory generator").

lines, map, cut, independent, outline, keep   the steps, each a function of text and replies
prompts                                       what the teacher is asked, in files
conversation                                  asks, checks the reply, sends it back with the breach
teacher                                       what a teacher is; openai_teacher, engine_teacher
grammar                                       the form of replies, for a teacher in our engine
student                                       answers to problems that have none
store                                         the folder: every reply is on disk before it is used
run                                           all steps over all trajectories
report                                        the table and the plot at the end
"""
