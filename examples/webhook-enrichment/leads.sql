-- Known at once, known after two answers of 503, unknown, a service that never answers, known. A sixth is rolled back.
INSERT INTO leads (id, email) VALUES
    (1, 'ann@acme.example'), (2, 'o''neill@busy-bees.example'), (3, 'x@nobody.example'), (4, 'y@down.example'),
    (5, 'zoë@sturm.example');
BEGIN;
INSERT INTO leads (id, email) VALUES (6, 'spam@acme.example');
ROLLBACK;

SELECT label, df.await_instance(id) FROM df.instances WHERE label LIKE 'lead %' ORDER BY label;
SELECT id, state, attempts, company ->> 'name' AS company, crm_lead IS NOT NULL AS in_crm FROM leads ORDER BY id;
