-- What the button in the chat does, or somebody in psql. An answer may come before the question has been sent: it is kept.
SELECT df.signal(id, 'approval', '{"approved": true, "by": "Ann"}') FROM df.instances WHERE label = 'vacuum events';
SELECT df.signal(id, 'approval', '{"approved": false, "by": "Ann"}') FROM df.instances WHERE label = 'vacuum "Visits"';

SELECT df.await_instance(id) FROM df.instances WHERE label LIKE 'vacuum %' ORDER BY label;
SELECT tab, dead, decision, decided_by, vacuumed_at IS NOT NULL AS vacuumed FROM maintenance ORDER BY dead DESC;
TABLE bloated;
