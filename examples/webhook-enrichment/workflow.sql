-- One lead: ask a service about its company, again and again if need be; hand it to the CRM if there is something to hand on.
CREATE FUNCTION enrich(lead int) RETURNS text LANGUAGE sql AS $workflow$
SELECT
  format('SELECT id, domain FROM leads WHERE id = %s', lead) |=> 'lead'
  ~> df.loop(
    -- A round is one try. A 5xx, a timeout or no connection fails it: the rest of the body is skipped.
    'UPDATE leads SET attempts = attempts + 1 WHERE id = $lead.id'
    ~> (df.http('{api}/companies/$lead.domain', 'GET', timeout_seconds => 5) |=> 'found')
    ~> ('SELECT $found.ok'
        ?> $$ UPDATE leads SET state = 'known', company = ($found.body)::jsonb WHERE id = $lead.id $$
        !> $$ UPDATE leads SET state = 'unknown' WHERE id = $lead.id $$)
    ~> df.break(),
    -- After a failed round: wait, and go on while there are tries left. Waiting costs a row, no connection.
    df.sleep(1) ~> 'SELECT attempts < 4 FROM leads WHERE id = $lead.id',
    continue_on_failure => true)
  ~> ('SELECT id, email, company FROM leads WHERE id = $lead.id AND state = ''known''' |=> 'ready')
  ~> df.if_rows('ready',
    (df.http('{api}/crm/leads', 'POST', '{"email": "$ready.email", "company": $ready.company}') |=> 'crm')
    ~> $$ UPDATE leads SET state = 'delivered', crm_lead = (($crm.body)::jsonb ->> 'lead')::int WHERE id = $lead.id $$,
    $$ UPDATE leads SET state = 'gave up' WHERE id = $lead.id AND state = 'new' $$)
$workflow$;

-- The row and its workflow are one transaction: what is rolled back is not called for.
CREATE FUNCTION lead_came() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM df.start(enrich(NEW.id), 'lead ' || NEW.id);
    RETURN NULL;
END $$;
CREATE TRIGGER lead_came AFTER INSERT ON leads FOR EACH ROW EXECUTE FUNCTION lead_came();
