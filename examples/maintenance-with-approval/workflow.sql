-- One table: ask in the chat, wait up to a day for the answer, and vacuum if it is yes.
-- VACUUM can't run in a transaction, so this step is at-least-once: after a crash it may run twice, which does no harm.
CREATE FUNCTION ask_then_vacuum(tab regclass, dead bigint) RETURNS text LANGUAGE sql AS $workflow$
SELECT
  format('INSERT INTO maintenance (workflow, tab, dead) VALUES (''{sys_instance_id}'', %L, %s)', tab, dead)
  ~> df.http('{api}/chat', body => json_build_object(
       'text', format('%s has %s dead rows. VACUUM?', tab, dead),
       'yes', $$SELECT df.signal('{sys_instance_id}', 'approval', '{"approved": true}')$$)::text)
  ~> df.wait_for_signal('approval', 86400) |=> 'answer'
  ~> df.if(
    $$ SELECT NOT $answer.timed_out AND COALESCE((($answer.data)::jsonb ->> 'approved')::boolean, false) $$,
    df.sql(format('VACUUM (ANALYZE) %s', tab))
    ~> $$ UPDATE maintenance SET decision = 'approved', decided_by = ($answer.data)::jsonb ->> 'by', vacuumed_at = now()
           WHERE workflow = '{sys_instance_id}' $$,
    $$ UPDATE maintenance
          SET decision = CASE WHEN $answer.timed_out THEN 'nobody answered' ELSE 'refused' END,
              decided_by = ($answer.data?)::jsonb ->> 'by'
        WHERE workflow = '{sys_instance_id}' $$)
$workflow$;

-- All tables: a workflow of its own for each bloated one that nobody has been asked about yet.
CREATE FUNCTION look_for_bloat() RETURNS SETOF text LANGUAGE sql AS $$
SELECT df.start(ask_then_vacuum(b.tab, b.dead), 'vacuum ' || b.tab)
  FROM bloated b
 WHERE NOT EXISTS (SELECT FROM maintenance m WHERE m.tab = b.tab AND m.decision IS NULL)
$$;

-- Every night at three, by the clock of the people who are asked.
SELECT df.start(
  @> (df.wait_for_schedule('0 3 * * *', 'Europe/Berlin') ~> 'SELECT look_for_bloat()'),
  'look for bloat') AS nightly \gset

-- And once now.
SELECT df.start('SELECT look_for_bloat()', 'look for bloat, once') AS id \gset
SELECT df.await_instance(:'id');
SELECT label, status FROM df.instances WHERE label LIKE 'vacuum %' ORDER BY label;
