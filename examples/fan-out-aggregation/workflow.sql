-- One branch for each region, all side by side; then one step puts their results together.
SELECT df.start(
  df.join(VARIADIC array_agg(format($$
    SELECT %1$L AS region, count(*) AS orders, sum(amount) AS revenue,
           round((percentile_cont(0.5) WITHIN GROUP (ORDER BY amount))::numeric, 2) AS median,
           (SELECT sold_on FROM sales WHERE region = %1$L GROUP BY sold_on ORDER BY sum(amount) DESC, sold_on LIMIT 1) AS best
      FROM sales WHERE region = %1$L $$, r.region) ORDER BY r.region)) |=> 'parts'
  ~> $$ INSERT INTO report (region, orders, revenue, median, best)
        SELECT row.* FROM jsonb_array_elements($parts::jsonb) AS part
         CROSS JOIN LATERAL jsonb_to_recordset(part -> 'rows')
               AS row(region text, orders bigint, revenue numeric, median numeric, best date)
        ON CONFLICT (region) DO UPDATE SET (orders, revenue, median, best)
            = (excluded.orders, excluded.revenue, excluded.median, excluded.best) $$
  ~> 'UPDATE report SET share = round(100 * revenue / (SELECT sum(revenue) FROM report), 1)',
  'report by region') AS id
  FROM (SELECT DISTINCT region FROM sales) r \gset

SELECT df.await_instance(:'id');
TABLE report ORDER BY region COLLATE "C";
