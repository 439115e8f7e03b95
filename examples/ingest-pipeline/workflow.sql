-- The workflow of one file, as a function: stage, deduplicate, transform, publish.
CREATE FUNCTION ingest(file text) RETURNS text LANGUAGE sql AS $workflow$
SELECT
  format('SELECT %L AS file', file) |=> 'job'

  -- Stage: what can't be taken is said, with its reason.
  ~> $$ INSERT INTO rejects (line, file, reason)
        SELECT s.line, s.file, fault(s) FROM staging s WHERE s.file = $job.file AND fault(s) IS NOT NULL
        RETURNING line $$ |=> 'bad'

  -- Deduplicate: the last line of an order counts; an order that was published stays as it is.
  ~> $$ INSERT INTO clean (order_id, file, customer, product, quantity, price, sold_at)
        SELECT DISTINCT ON (s.order_id::int) s.order_id::int, s.file, btrim(s.customer), lower(btrim(s.product)),
               s.quantity::int, s.price::numeric, (s.sold_at || ' UTC')::timestamptz
          FROM staging s
         WHERE s.file = $job.file AND s.line <> ALL ($bad)
           AND NOT EXISTS (SELECT FROM sales p WHERE p.order_id = s.order_id::int)
         ORDER BY s.order_id::int, s.line DESC $$

  -- Transform: the two dimensions side by side.
  ~> ($$ INSERT INTO customers (name, first_order)
         SELECT customer, min(sold_at) FROM clean WHERE file = $job.file GROUP BY customer
         ON CONFLICT (name) DO UPDATE SET first_order = least(customers.first_order, excluded.first_order) $$
      & $$ INSERT INTO products (name, last_price, price_at)
           SELECT DISTINCT ON (product) product, price, sold_at FROM clean WHERE file = $job.file ORDER BY product, sold_at DESC
           ON CONFLICT (name) DO UPDATE SET last_price = excluded.last_price, price_at = excluded.price_at
           WHERE products.price_at < excluded.price_at $$)

  -- Publish: one transaction, all or nothing.
  ~> $$ WITH moved AS (DELETE FROM clean WHERE file = $job.file RETURNING *),
             published AS (INSERT INTO sales (order_id, customer, product, quantity, price, sold_at, file)
                           SELECT order_id, customer, product, quantity, price, sold_at, file FROM moved RETURNING order_id),
             done AS (DELETE FROM staging WHERE file = $job.file RETURNING line)
        INSERT INTO publications (file, lines, rejected, published)
        SELECT $job.file, (SELECT count(*) FROM done), (SELECT count(*) FROM $bad.*), (SELECT count(*) FROM published) $$
  ~> 'REFRESH MATERIALIZED VIEW CONCURRENTLY revenue'
$workflow$;
